"""Single samples as the model sees them, for a person to look at: in the terminal, on a page, and how long all of a
data set are.

Knows data, tokenizers and options. Loads no weights, and writes nothing but a page that was asked for."""
