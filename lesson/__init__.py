"""The course: a drawn set of scenes, what is measured on it, and what came out."""
