"""Python imports this when it starts with this folder on its path, as in the processes that tests start."""

from tests.support import fixed_costs

fixed_costs.install()
