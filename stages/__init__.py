"""One file per stage, plain functions on values: encode text, encode pictures, noise, inpaint, decode, finish."""
