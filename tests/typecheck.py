"""Checks the array shapes written in the core's signatures, whenever a test calls them."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is fine where a float is asked for
