"""The Inception family on minigrad: models, data, training, and the command line."""
