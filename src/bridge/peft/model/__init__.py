"""A model that carries branches."""
