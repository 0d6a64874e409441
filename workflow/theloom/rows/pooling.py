"""How the rows of several tokens become one."""

ADDED_UP = ("mean", "sum", "max")  # made of several tokens' values; `first` and `last` are of one
