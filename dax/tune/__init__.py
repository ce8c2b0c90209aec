"""dax tune: the cheapest plan that holds a stated fidelity, found by measuring."""
