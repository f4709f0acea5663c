"""Learning rate and adaptor size on valid: `owlrec ctr sweep RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("ctr", "sweep")
