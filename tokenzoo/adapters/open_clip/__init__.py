"""open_clip's own image towers; imported once a model of that package is met."""
