"""Where models and data come from when no model file is given."""
