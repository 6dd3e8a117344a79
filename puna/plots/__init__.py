"""Small plots and plain pages that load nothing: what every report is made of."""
