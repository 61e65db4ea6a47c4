"""The project's pages, and the module that writes the pages on the settings."""
