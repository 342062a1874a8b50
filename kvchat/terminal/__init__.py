"""What a person sees: the input loop, commands, views, and the one way text reaches the terminal."""
