"""What a person sees: the loop, commands, views, and the one way text reaches the terminal."""
