"""A run on film: what every step of every stage held, as one page to look through."""
