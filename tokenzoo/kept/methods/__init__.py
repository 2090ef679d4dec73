"""Public paths of version 0.1 below `tokenzoo.methods`."""
