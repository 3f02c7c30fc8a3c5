"""The report of a study: figures, and one HTML file that shows them beside the numbers of the paper."""
