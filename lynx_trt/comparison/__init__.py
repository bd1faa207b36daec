"""An artifact side by side with what a user would otherwise run: is it right, what does it cost, how fast is it."""
