"""What `import deep_ep` finds when this directory is on PYTHONPATH: gives its name to `commlib.compat.deep_ep`."""

import sys

from commlib.compat import install

del sys.modules[__name__]  # this module: install() takes it for another library otherwise
install()
