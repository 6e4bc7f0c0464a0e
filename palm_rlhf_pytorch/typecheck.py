"""beartype as this package uses it: wrong types raise TypeError, and an int will do where a float is asked for.

Public constructors and entry points are decorated with it; it knows nothing of what they do. Of a sequence the first
item is checked: by default beartype picks one by Python's global random state, and so advances it.
"""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(violation_type=TypeError, is_pep484_tower=True, is_random=False))
