"""One page of HTML of one run or several, which needs nothing but itself."""
