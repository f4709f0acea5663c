"""Who is like whom: collaborative vectors, cohorts of users and items, and who stands for each cohort."""
