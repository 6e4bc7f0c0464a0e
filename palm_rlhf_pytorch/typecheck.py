"""beartype as this package uses it: wrong types raise TypeError, and an int will do where a float is asked for.

Public constructors and entry points are decorated with it; it knows nothing of what they do.
"""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(violation_type=TypeError, is_pep484_tower=True))
