"""The explorer: read-only pages for browsing a release."""
