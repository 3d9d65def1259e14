"""What is done at the phases of a rehearsed recipe, with torch."""
