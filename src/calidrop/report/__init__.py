"""`calidrop report`: a run of `calidrop eval` as one page, and as pictures."""
