"""The explorer: pages on which a person looks at what a release knows. Nothing on them can change anything."""
