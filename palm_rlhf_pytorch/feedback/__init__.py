"""People judge in a browser: Django and htmx, extra [feedback]. Nothing outside but `cli` imports it."""
