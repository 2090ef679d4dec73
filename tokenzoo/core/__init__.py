"""What methods and adapters speak: tokens, signals, methods, schedules, recipes, the registry, lifting."""
