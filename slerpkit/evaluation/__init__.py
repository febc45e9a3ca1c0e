"""Models are loaded and asked: tastes, perplexities, the harness, and the search for a good t by these."""
