"""Tables and plots of all benchmarks, from the committed files alone."""
