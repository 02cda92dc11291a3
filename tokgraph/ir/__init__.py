"""The ground floor: what a user writes, task graphs, and facts, costs, plans and verifications as data."""
