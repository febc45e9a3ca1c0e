"""What a person sees and is asked: prompts, panels, progress, flags. Nothing below this package knows it."""
