"""One file for each page: `routes(site)` gives its routes; the table of contents is mule.web.app."""
