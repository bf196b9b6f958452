"""The report: one schema-versioned JSON document, and its view on the terminal."""
