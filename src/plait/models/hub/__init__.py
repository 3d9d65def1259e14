"""Names of published weights under ours and back: one file a layout."""
