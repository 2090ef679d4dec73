"""Public paths of version 0.1 below `tokenzoo.evaluation`."""
