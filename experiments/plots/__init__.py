"""Pictures as SVG text, one file a subject; nobody below this floor draws."""
