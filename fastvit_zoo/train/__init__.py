"""Training of classifiers by the paper's recipe, validated in the fused form."""
