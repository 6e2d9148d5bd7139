``dials.diffuse_scale``: Write a report with scales, surfaces, chi-squared before and after, outliers and the error model, as a page that needs no network and as JSON.
