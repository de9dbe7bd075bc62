"""Every source behind one door."""
