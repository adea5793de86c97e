"""The command line, one module per noun; `fedcompose.cli` puts them together. Only these modules print."""
