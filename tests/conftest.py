"""What holds for all tests."""

import os

os.environ["COMMLIB_PLANS"] = "off"  # whatever has been tuned on this machine
