"""The Ray Serve applications, and what `owlrec serve` starts: owlrec.serving on Ray."""
