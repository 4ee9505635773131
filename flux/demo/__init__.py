"""The demo world: a renderer with its captions, a referee that reads pixels, and the weights trained on both."""
