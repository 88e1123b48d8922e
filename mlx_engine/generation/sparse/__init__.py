"""SpecPrefill: parts of a long prompt are left out, by what a draft model attends to."""
