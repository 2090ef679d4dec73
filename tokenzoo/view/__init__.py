"""Token maps over images, and panels."""
