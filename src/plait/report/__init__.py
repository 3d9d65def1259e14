"""Run folder to pictures; reads files, never live objects."""
