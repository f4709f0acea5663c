"""Shared parts of the Serve applications, as plain Python: request schemas, API keys, limits, errors, current release.

`knowledge_api` and the others are complete ASGI applications, which unit tests call without Ray; owlrec.apps wraps them
in deployments.
"""
