"""The shipped model, the script that trained it, and recipes for known models."""
