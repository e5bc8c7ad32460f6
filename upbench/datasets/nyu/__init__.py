"""NYU Depth v2: its labelled images, and the ones that GeoNet's authors made of its videos."""
