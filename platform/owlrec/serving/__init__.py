"""What the Serve applications share, as plain Python: request schemas, API keys, limits, errors, the current release.

`knowledge_api` and its kin are complete ASGI applications, which unit tests call without Ray; owlrec.apps wraps them in
deployments.
"""
