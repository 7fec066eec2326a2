"""The part that trains. The only torch in this package is in this folder."""
